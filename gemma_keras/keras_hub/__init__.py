"""From KerasHub's models and to them."""
