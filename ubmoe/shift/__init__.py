"""What the attention sink's fall costs: the first token's score shifted, in every head."""
