"""Settings as users write them: YAML and command line in, checked dataclasses out, every mistake with its line."""
