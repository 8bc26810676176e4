"""Another package, as somebody else would write it: a family, a source, a descriptor and a stage, a file each."""
