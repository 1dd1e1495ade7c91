"""Planning a model without a preset: rules from transformers' `tp_plan`, used only with a proof."""
