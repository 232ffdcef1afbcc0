"""What cutting, refitting, exporting and reviving experts costs."""
