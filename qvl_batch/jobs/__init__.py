"""The Ray jobs: plan, embed, verify."""
