"""What people call on a sharded model, its engine and its optimizer, and was written for a model that is not sharded.

Each such call does the right thing here, or is refused with what to call instead. `docs/calls.md` lists them all.

Not here: Hugging Face's Trainer and PEFT (`runtime.integrations`), and what `TrainingPlan` offers itself.
"""
