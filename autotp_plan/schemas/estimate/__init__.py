"""What is asked of an estimate, and what it says."""
