"""The cluster side: read the config, plan the chain, submit its jobs, run each one, report on them."""
