"""What the loss looks like around the weights: sharpness and landscapes."""
