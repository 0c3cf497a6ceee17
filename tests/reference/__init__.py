"""Cases and independent references that several tests share."""
