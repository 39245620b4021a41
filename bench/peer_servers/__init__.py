"""The null model behind other people's servers; run by their own interpreter, which has nothing of ours but this."""
