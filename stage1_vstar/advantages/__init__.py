"""The table of advantages that Direct Advantage Policy Optimization trains on."""
