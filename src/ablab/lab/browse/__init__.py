"""A page of runs and ablations, built from their folders alone, without an account or a server."""
