#!/usr/bin/env bash
# Varnish 7.1.1 (Debian 12) gives a request no answer at all when VCL says "return (pipe)" and the server cannot be
# reached: it closes the connection, and neither vcl_backend_error nor vcl_synth is asked. The same request with
# "return (pass)" is answered with the 503 of vcl_backend_error. A pipe is what is advised for WebSocket and Server-Sent
# Events, and to a client behind another proxy the difference is a 502 that no VCL can change.
#
# Seen: pass: the status and the body that vcl_backend_error sets; pipe: 0 bytes, and the end of the connection.
# Fails if that changes. Needs bash, python3, gcc (for Varnish), apt-get, dpkg.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$dir"' EXIT
cd "$dir"
chmod 755 .
apt-get download -qq "varnish=7.1.1-2+deb12u1" "libvarnishapi3=7.1.1-2+deb12u1" libedit2 libbsd0 libjemalloc2 2>/dev/null
for deb in *.deb; do dpkg -x "$deb" .; done
lib="$dir/usr/lib/$(uname -m)-linux-gnu"
export LD_LIBRARY_PATH="$lib:$lib/varnish:$dir/usr/lib/varnish"

cat >site.vcl <<'V'
vcl 4.1;
backend away { .host = "127.0.0.1"; .port = "18651"; }  # nobody listens there
sub vcl_recv {
	if (req.url ~ "^/pipe") { return (pipe); }
	return (pass);
}
sub vcl_backend_error {
	set beresp.status = 599;
	set beresp.body = "from vcl_backend_error";
	return (deliver);
}
sub vcl_synth {
	set resp.status = 598;
	return (deliver);
}
V
cat >client.py <<'P'
import socket, sys
c = socket.create_connection(("127.0.0.1", 18652), timeout=10)
c.sendall(b"GET /%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % sys.argv[1].encode())
got = b""
while piece := c.recv(65536):
    got += piece
print(len(got) and got.split()[1].decode(), got[-22:].decode())
P
usr/sbin/varnishd -F -n "$dir/run" -a 127.0.0.1:18652 -f "$dir/site.vcl" >log 2>&1 &
for _ in $(seq 50); do
  sleep .2
  python3 client.py pass >/dev/null 2>&1 && break
done
pass=$(python3 client.py pass)
pipe=$(python3 client.py pipe)
usr/sbin/varnishd -V 2>&1 | sed -n 1p
echo "pass: $pass; pipe: $pipe"
[ "$pass" = "599 from vcl_backend_error" ] && [ "$pipe" = "0 " ]
