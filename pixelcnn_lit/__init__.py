"""Class-conditional PixelCNN image models in PyTorch Lightning."""
