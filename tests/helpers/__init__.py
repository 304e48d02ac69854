"""What several tests use: small data, small runs, checks that every rank makes."""
