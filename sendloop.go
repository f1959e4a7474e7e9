package main

import (
	"bytes"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// A backend posts its events over a few connections that stay open, and for
// each request net/http takes longer than the event's way to the browser. So
// once a connection has brought one POST /internal/send it is served here, by
// hand. This code knows requests in their plainest form only (RFC 9112); with
// any other it gives the connection back to net/http, unread.

const (
	sendIdle      = 2 * time.Minute // a silent connection is closed
	sendIdleSlack = 10 * time.Second
	sendBuffer    = 4 << 10  // bytes that a connection's buffer begins with
	sendBufferMax = 64 << 10 // a larger one is not kept between requests
)

// sendLoop serves conn; buf is what has been read of it already.
func (g *gateway) sendLoop(conn *net.TCPConn, buf []byte) {
	var text, answer []byte
	var deadline time.Time
	for {
		mediaType, head, size, plain := parsePlainSend(buf)
		if !plain {
			conn.SetDeadline(time.Time{})
			g.returned.give(&returnedConn{conn, bytes.NewReader(buf)})
			return
		}
		if now := time.Now(); deadline.Sub(now) < sendIdle-sendIdleSlack { // not each time: it costs a timer
			deadline = now.Add(sendIdle)
			conn.SetDeadline(deadline)
		}
		if size > 0 && len(buf) >= size {
			var status int
			status, text = g.answerSend(text[:0], mediaType, buf[head:size])
			answer = appendAnswer(answer[:0], mediaType, status, text)
			if _, err := conn.Write(answer); err != nil {
				conn.Close()
				return
			}
			rest := buf[size:]
			if cap(buf) > sendBufferMax {
				buf = nil
			}
			buf = append(buf[:0], rest...)
			continue
		}
		buf = growBuffer(buf, size)
		n, err := conn.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if err != nil {
			conn.Close()
			return
		}
	}
}

// growBuffer makes room in buf for a request of size bytes, or for more of
// one whose size is not known yet.
func growBuffer(buf []byte, size int) []byte {
	if size == 0 && len(buf) == cap(buf) {
		size = max(sendBuffer, 2*cap(buf))
	}
	if size <= cap(buf) {
		return buf
	}
	return append(make([]byte, 0, size), buf...)
}

const plainSend = "POST /internal/send HTTP/1.1\r\n"

// parsePlainSend looks at the head of a request. size is that of the whole
// request, 0 while the head is incomplete; plain is false if the request is
// anything but a POST /internal/send with a Content-Length.
func parsePlainSend(buf []byte) (mediaType string, head, size int, plain bool) {
	if n := min(len(buf), len(plainSend)); string(buf[:n]) != plainSend[:n] {
		return "", 0, 0, false
	}
	head = bytes.Index(buf, []byte("\r\n\r\n")) + 4
	if head <= len(plainSend) {
		return "", 0, 0, head < 4 && len(buf) <= maxHeader
	}
	length := -1
	for rest := buf[len(plainSend) : head-2]; len(rest) > 0; {
		line, after, _ := bytes.Cut(rest, []byte("\r\n"))
		rest = after
		name, value, ok := bytes.Cut(line, []byte(":"))
		if !ok || bytes.IndexByte(line, '\n') >= 0 || bytes.ContainsAny(name, " \t") {
			return "", 0, 0, false
		}
		value = bytes.Trim(value, " \t")
		switch {
		case equalFold(name, "content-length"):
			n, err := strconv.ParseUint(string(value), 10, 31)
			if err != nil || length >= 0 {
				return "", 0, 0, false
			}
			length = int(n)
		case equalFold(name, "content-type"):
			value, _, _ = bytes.Cut(value, []byte(";"))
			switch {
			case equalFold(value, oneSend):
				mediaType = oneSend
			case equalFold(value, ndjson):
				mediaType = ndjson
			}
		case equalFold(name, "connection"):
			if !equalFold(value, "keep-alive") {
				return "", 0, 0, false
			}
		case equalFold(name, "transfer-encoding"), equalFold(name, "expect"), equalFold(name, "upgrade"):
			return "", 0, 0, false
		}
	}
	fits := mediaType == oneSend && length <= maxSend || mediaType == ndjson && length <= maxBatch
	return mediaType, head, head + length, fits && length >= 0
}

// equalFold compares with a lower-case ASCII text.
func equalFold(b []byte, lower string) bool {
	if len(b) != len(lower) {
		return false
	}
	for i := range b {
		c := b[i]
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c != lower[i] {
			return false
		}
	}
	return true
}

// appendAnswer appends a response.
func appendAnswer(b []byte, mediaType string, status int, body []byte) []byte {
	b = append(b, "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(status), 10)
	b = append(b, ' ')
	b = append(b, http.StatusText(status)...)
	b = append(b, "\r\nContent-Type: "...)
	b = append(b, mediaType...)
	b = append(b, "\r\nDate: "...)
	b = time.Now().UTC().AppendFormat(b, http.TimeFormat)
	b = append(b, "\r\nContent-Length: "...)
	b = strconv.AppendInt(b, int64(len(body)), 10)
	b = append(b, "\r\n\r\n"...)
	return append(b, body...)
}

// returnedConn is a connection whose first bytes have been read already.
type returnedConn struct {
	*net.TCPConn
	first *bytes.Reader
}

func (c *returnedConn) Read(b []byte) (int, error) {
	if c.first.Len() > 0 {
		return c.first.Read(b)
	}
	return c.TCPConn.Read(b)
}

// returnListener accepts the connections that sendLoop gives back.
type returnListener struct {
	conns  chan net.Conn
	closed chan struct{}
	close  sync.Once
}

func newReturnListener() *returnListener {
	return &returnListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *returnListener) give(c net.Conn) {
	select {
	case l.conns <- c:
	case <-l.closed:
		c.Close()
	}
}

func (l *returnListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *returnListener) Close() error {
	l.close.Do(func() { close(l.closed) })
	return nil
}

func (l *returnListener) Addr() net.Addr { return &net.TCPAddr{} }
