"""What several scripts of ``bench`` need: images and a network, tables and figures."""
