"""Learning from answers that the model writes itself and that are rewarded: GRPO and RLOO."""
