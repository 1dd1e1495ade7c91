"""What a training step of a plan takes: memory, communication, floating-point operations. Without torch."""
