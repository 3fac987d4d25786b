"""The parts of detect.py besides its loop: scenes, matching of detections, pictures."""
