"""What a Mixture-of-Experts model is: families, the MoE layers of a live model, and what its config says of them."""
