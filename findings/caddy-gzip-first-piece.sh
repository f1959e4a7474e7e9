#!/usr/bin/env bash
# Caddy 2.6.2 (Debian 12) with "encode gzip": whether Server-Sent Events come as they are sent or are held back
# depends on the length of the first piece alone. If the first that the server writes has 512 bytes or more, nothing
# reaches the client until the answer ends or gzip's buffers are full, however many small events follow; if it is
# shorter, such as a comment of two bytes, the stream is never compressed and each event, also a long one, comes at
# once. Without "encode" the long piece comes at once, too.
#
# Seen: first piece of 500 bytes: the first byte after 0.0 s, and all 30 events as they were sent; 600 bytes: after
# 3.0 s, at the end; a comment and then 600 bytes: 0.0 s; 600 bytes without encode: 0.0 s.
# Fails if that changes. Needs bash, python3, apt-get, dpkg.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$dir"' EXIT
cd "$dir"
apt-get download -qq "caddy=2.6.2*" 2>/dev/null
dpkg -x caddy_*.deb .

cat >server.py <<'P'
import random, socket, threading, time
l = socket.create_server(("127.0.0.1", 18731))
def serve(c):
    def write(piece):
        c.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
    first = c.recv(65536).split()[1].decode().strip("/")
    c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    c.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    if first.startswith("comment"):
        write(b":\n")
        time.sleep(.1)
    write(b"data: %s\n\n" % bytes(random.choices(b"abcdefgh", k=int(first.strip("comment")))))
    for i in range(30):
        time.sleep(.1)
        write(b"data: %d\n\n" % i)
    c.sendall(b"0\r\n\r\n")
    c.close()
while True:
    threading.Thread(target=serve, args=(l.accept()[0],), daemon=True).start()
P
cat >client.py <<'P'
import socket, sys, time
c = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
c.sendall(b"GET /%s HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n" % sys.argv[2].encode())
began, got, at = time.time(), b"", []
while piece := c.recv(65536):
    got += piece
    if len(got.partition(b"\r\n\r\n")[2]) > (40 if "gzip" in got.decode("latin1").partition("\r\n\r\n")[0] else 4):
        at.append(time.time() - began)
print("%.1f s, in %s pieces" % (at[0], "many" if len(at) > 20 else "few"))
P
printf '{\n\tadmin off\n}\nhttp://127.0.0.1:18732 {\n\tencode gzip\n\treverse_proxy 127.0.0.1:18731\n}\nhttp://127.0.0.1:18733 {\n\treverse_proxy 127.0.0.1:18731\n}\n' >Caddyfile
python3 server.py &
HOME="$dir" usr/bin/caddy run --adapter caddyfile --config Caddyfile 2>/dev/null &
for _ in $(seq 50); do
  sleep .2
  (exec 3<>/dev/tcp/127.0.0.1/18733) 2>/dev/null && break
done
short=$(python3 client.py 18732 500)
long=$(python3 client.py 18732 600)
after=$(python3 client.py 18732 comment600)
plain=$(python3 client.py 18733 600)
echo "Caddy $(usr/bin/caddy version), first piece of 500 bytes: $short; 600: $long; 600 after a comment: $after; 600 without encode: $plain"
[ "$long" = "3.0 s, in few pieces" ]
for seen in "$short" "$after" "$plain"; do [[ $seen = "0."[012]" s, in many pieces" ]]; done
