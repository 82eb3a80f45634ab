"""FP8 weights and activations on Hopper's FP8 matrix instructions."""
