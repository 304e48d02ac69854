"""How the processes of a job meet, share and stop."""
