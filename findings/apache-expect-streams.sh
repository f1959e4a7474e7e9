#!/usr/bin/env bash
# Whether Apache 2.4.71 (Debian 12, mod_proxy_http) hands a chunked request body on as it comes depends on a header that
# has nothing to do with it. Without "Expect: 100-continue" nothing reaches the server, not even the request line, until
# the body has 16 KiB or ends; with it each piece goes on at once. curl sends the header for a body of unknown length,
# most other clients never do, so a long request that was tried out with curl is silent with the real client.
# "SetEnv proxy-prefetch-nonblocking 1" makes both the same.
#
# Seen: pieces at 0, 1 and 2 s: the server had the first after 2.0 s without the header, after 0.0 s with it, and
# with the variable after 0.0 s either way.
# Fails if that changes. Needs bash, python3, apt-get, dpkg.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$dir"' EXIT
cd "$dir"
chmod 755 .
apt-get download -qq "apache2-bin=2.4.71-*" libapr1 libaprutil1 libnghttp2-14 libcurl4 liblua5.3-0 libbrotli1 libjansson4 2>/dev/null
for deb in *.deb; do dpkg -x "$deb" .; done
export LD_LIBRARY_PATH="$dir/usr/lib/$(uname -m)-linux-gnu"

cat >conf <<C
ServerRoot $dir
LoadModule mpm_event_module  usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module usr/lib/apache2/modules/mod_authz_core.so
LoadModule env_module        usr/lib/apache2/modules/mod_env.so
LoadModule proxy_module      usr/lib/apache2/modules/mod_proxy.so
LoadModule proxy_http_module usr/lib/apache2/modules/mod_proxy_http.so
PidFile $dir/pid
ErrorLog $dir/log
ServerName localhost
User www-data
Group www-data
Listen 127.0.0.1:18822
Listen 127.0.0.1:18823
<VirtualHost *:18822>
ProxyPass / http://127.0.0.1:18821/
</VirtualHost>
<VirtualHost *:18823>
ProxyPass / http://127.0.0.1:18821/
SetEnv proxy-prefetch-nonblocking 1
</VirtualHost>
C
cat >test.py <<'P'
import socket, sys, threading, time
server = socket.create_server(("127.0.0.1", 18821))
first = [0.0]
def serve(c):
    got = b""
    first[0] = 0
    while got.count(b"hello") < 3: # with Content-Length or chunked, as Apache likes
        piece = c.recv(65536)
        if b"100-continue" in piece:
            c.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        got += piece
        if b"hello" in got:
            first[0] = first[0] or time.time()
    c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    c.close()
def accept():
    while True:
        threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
threading.Thread(target=accept, daemon=True).start()

def ask(port, header):
    c = socket.create_connection(("127.0.0.1", port))
    began = time.time()
    c.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n%s\r\n" % header)
    for last in False, False, True:
        c.sendall(b"5\r\nhello\r\n")
        if last:
            c.sendall(b"0\r\n\r\n")
        else:
            time.sleep(1)
    c.settimeout(9)
    answer = b""
    while b" 200 " not in answer: # after a 100, if there is one
        if not (piece := c.recv(65536)):
            sys.exit(f"answer: {answer}")
        answer += piece
    return round(first[0] - began, 1)
expect = b"Expect: 100-continue\r\n"
plain, expects, variable, both = ask(18822, b""), ask(18822, expect), ask(18823, b""), ask(18823, expect)
print(f"first piece after {plain} s, with Expect {expects} s; with the variable {variable} s and {both} s")
sys.exit(not (plain > 1.8 and max(expects, variable, both) < 0.8))
P
usr/sbin/apache2 -v | sed -n 1p
usr/sbin/apache2 -DFOREGROUND -f "$dir/conf" &
for port in 18822 18823; do
  for _ in $(seq 50); do
    (exec 3<>/dev/tcp/127.0.0.1/$port) 2>/dev/null && break
    sleep .2
  done
done
timeout 60 python3 test.py
