"""Programs that nobody has read, run where they can do no harm. Imports nothing of this kit, and no torch."""
