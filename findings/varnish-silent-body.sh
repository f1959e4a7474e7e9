#!/usr/bin/env bash
# Varnish 7.1.1 (Debian 12) gives up a request whose body pauses for 5 seconds, with "return (pass)" or the built-in VCL:
# it answers 503, Backend fetch failed, and the server is left with half a body. The limit is timeout_idle, which is
# described as that of connections between requests, "until we have received the full request headers", and this is
# long after those. first_byte_timeout and between_bytes_timeout, which VCL can set for a backend, are not asked, and
# sess.timeout_idle in VCL does not help either; only the parameter of the whole process does.
#
# Seen: a chunked body with a pause of 8 s: 503 after 5 s; with sess.timeout_idle = 60s in VCL: the same; with -p
# timeout_idle=60: 200.
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

cat >plain.vcl <<'V'
vcl 4.1;
backend server { .host = "127.0.0.1"; .port = "18831"; .first_byte_timeout = 60s; .between_bytes_timeout = 60s; }
sub vcl_recv { return (pass); }
V
sed 's/return (pass)/set sess.timeout_idle = 60s; return (pass)/' plain.vcl >session.vcl
cat >server.py <<'P'
import socket, threading
server = socket.create_server(("127.0.0.1", 18831))
def serve(c):
    got = b""
    while piece := c.recv(65536):
        got += piece
        if got.endswith(b"0\r\n\r\n"):
            c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            break
    c.close()
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
P
cat >client.py <<'P'
import socket, sys, threading, time
def ask(port, pause):
    c = socket.create_connection(("127.0.0.1", port), timeout=20)
    began = time.time()
    c.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    rest = threading.Timer(pause, lambda: c.sendall(b"5\r\nhello\r\n0\r\n\r\n"))
    rest.start()
    status = c.recv(65536).split()[1].decode()
    rest.cancel()
    return f"{status} after {time.time() - began:.0f} s"
print(ask(int(sys.argv[1]), float(sys.argv[2])))
P
python3 server.py &
usr/sbin/varnishd -F -n "$dir/run1" -a 127.0.0.1:18832 -f "$dir/plain.vcl" >log1 2>&1 &
usr/sbin/varnishd -F -n "$dir/run2" -a 127.0.0.1:18833 -f "$dir/session.vcl" >log2 2>&1 &
usr/sbin/varnishd -F -n "$dir/run3" -a 127.0.0.1:18834 -p timeout_idle=60 -f "$dir/plain.vcl" >log3 2>&1 &
for port in 18832 18833 18834; do
  for _ in $(seq 50); do
    sleep .2
    [ "$(python3 client.py $port 0 2>/dev/null)" = "200 after 0 s" ] && break
  done
done
plain=$(python3 client.py 18832 8)
session=$(python3 client.py 18833 8)
parameter=$(python3 client.py 18834 8)
usr/sbin/varnishd -V 2>&1 | sed -n 1p
echo "plain: $plain; sess.timeout_idle: $session; -p timeout_idle: $parameter"
[ "$plain, $session, $parameter" = "503 after 5 s, 503 after 5 s, 200 after 8 s" ]
