"""What should be merged, and how? Merging against other ways to send a latent in fewer bits."""
