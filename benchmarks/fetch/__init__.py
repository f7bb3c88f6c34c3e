"""How long it takes from S3 to a usable folder: this library, its peers, and what the machine could do at most."""
