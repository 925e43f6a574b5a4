"""Generation in Keras: the loop, what is compiled, what is refused."""
