"""What detect.py is made of beside its loop: scenes, what was found in them, pictures."""
