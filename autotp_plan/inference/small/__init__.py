"""Small models that inference runs in the place of the real one, of transformers or of the user's function."""
