"""How the programs speak to whoever runs them: errors in one line, values of config keys."""
