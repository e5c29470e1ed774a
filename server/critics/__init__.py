"""The critics in the workers, as the API process knows and calls them."""
