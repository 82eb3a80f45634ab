"""What an output is and how it was made: check sums, verification, running it again, the model card, signatures."""
