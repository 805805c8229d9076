"""The methods, one file each or a close family: a class, and the rules that it declares."""
