"""Models as parameter containers: DiT, VAE, text encoder."""
