"""Libraries that people train with: Hugging Face's Trainer and Accelerate, PEFT's LoRA.

Not here: their private names (`huggingface.internals`).
"""
