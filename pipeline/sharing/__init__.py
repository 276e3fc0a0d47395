"""A cache on the Hugging Face Hub: pushed, with a card, Croissant metadata and the licences it comes from."""
