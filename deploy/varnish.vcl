# Varnish in front of a backend and a gateway on the same machine. Complete:
# varnishd -a :80 -p timeout_idle=300 -f /etc/sidecast/varnish.vcl
# By default a worker whose reports are one body loses it when it is silent for five seconds. TASK_TIMEOUT_SECONDS is 300.
# Each stream takes a thread, of which there are 10 000 by default.

vcl 4.1;
import std;

backend default { .host = "127.0.0.1:8080"; }
backend gateway {
	.host = "127.0.0.1:3000";
	.probe = { .url = "/healthz"; .interval = 1s; .window = 1; .threshold = 1; }
}

sub vcl_recv {
	# What backend and gateway say to each other and to Prometheus, and other spellings of it: no path has an escape, but
	# for the ID of a task.
	if (req.url ~ "^/(internal/|metrics(\?|$)|api/sse/callback(\?|$))|^[^?]*(//|/\.\.)" ||
	    req.url ~ "^[^?]*%" && req.url !~ "^/api/tasks/") {
		return (synth(404));
	}
	# Only a pipe holds nothing back and tells the gateway of a browser that left. Where it leads nowhere it ends without
	# an answer, for which an EventSource may give up, as it does on any status but 200. It comes back by itself after a
	# stream that ends.
	if (req.url ~ "^/api/sse/") {
		if (!std.healthy(gateway)) {
			return (synth(200));
		}
		set req.backend_hint = gateway;
		return (pipe);
	}
	return (pass);   # nothing is kept
}

# In place of the gateway while it restarts, also for pages of another site.
sub vcl_synth {
	if (resp.status == 200) {
		set resp.http.Content-Type = "text/event-stream";
		set resp.http.Cache-Control = "no-store";
		set resp.http.Access-Control-Allow-Origin = req.http.Origin;
		set resp.http.Access-Control-Allow-Credentials = "true";
		set resp.body = {"retry: 3000
: gateway is away
"};
		return (deliver);
	}
}
