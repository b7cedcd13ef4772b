"""A page of runs and ablations, made from their folders alone: for one person, without an account and a server."""
