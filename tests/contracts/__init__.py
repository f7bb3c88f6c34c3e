"""What every implementation of a Protocol must do; subclass one of these to test your own."""
