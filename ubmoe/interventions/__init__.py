"""What a model loses when its masks, its layers or its attention sink are changed, untrained."""
