"""What lies below the layer's public names."""
