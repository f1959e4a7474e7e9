# Varnish in front of a backend and a gateway on the same machine. Complete: varnishd -a :80 -f /etc/sidecast/varnish.vcl
# Each stream takes a thread, of which there are 10 000 by default.

vcl 4.1;

backend default { .host = "127.0.0.1:8080"; }
backend gateway { .host = "127.0.0.1:3000"; }

sub vcl_recv {
	# What backend and gateway say to each other and to Prometheus, and other spellings of it: no path has an escape, but
	# for the ID of a task.
	if (req.url ~ "^/(internal/|metrics(\?|$)|api/sse/callback(\?|$))|^[^?]*(//|/\.\.)" ||
	    req.url ~ "^[^?]*%" && req.url !~ "^/api/tasks/") {
		return (synth(404));
	}
	# Only a pipe holds nothing back and tells the gateway of a browser that left. While the gateway restarts, Varnish
	# closes the connection without an answer, and the browser comes back.
	if (req.url ~ "^/api/sse/") {
		set req.backend_hint = gateway;
		return (pipe);
	}
	return (pass);   # nothing is kept
}
