"""Libraries that people train with: Hugging Face's Trainer and Accelerate, PEFT's LoRA."""
