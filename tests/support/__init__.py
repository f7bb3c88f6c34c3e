"""What tests share: servers, a proxy that breaks things, stand-ins at the seams."""
