"""Linear layers of several experts: tokens sorted by expert on the GPU, and one launch for all experts."""
