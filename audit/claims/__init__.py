"""What a stranger says of a file, and what is made of it: captions, and how many training images."""
