// A hand-written HTTP server for POST /internal/send on connections that stay open. A backend posts its events over a
// few of those, and net/http takes longer for a request than the event takes to the browser: 31 µs instead of 21 for
// both. Only the plainest form of a request is known here (RFC 9112); for any other the connection goes back to
// net/http, with what has been read of it. TestSendConnection checks that both give the same answers.

package main

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	sendIdle      = 2 * time.Minute  // a silent connection is closed
	sendDue       = 30 * time.Second // for a request, from its first byte, as in newServer
	sendIdleSlack = 10 * time.Second
	sendBuffer    = 4 << 10   // what a connection's buffer begins with
	sendBufferMax = 256 << 10 // a larger buffer is not kept
)

// keepSending writes the answer to a connection that was taken over from net/http, and serves it from then on.
func (g *gateway) keepSending(conn net.Conn, read *bufio.Reader, answer []byte) {
	ahead, _ := read.Peek(read.Buffered())
	if r, ok := conn.(*returnedConn); ok {
		more, _ := io.ReadAll(r.first)
		ahead = append(ahead, more...)
		conn = r.TCPConn
	}
	conn.SetDeadline(time.Now().Add(sendIdle))
	if _, err := conn.Write(answer); err != nil {
		conn.Close()
		return
	}
	g.sendLoop(conn, ahead)
}

// sendLoop serves conn. buf is what has been read from it.
func (g *gateway) sendLoop(conn net.Conn, buf []byte) {
	var text, answer []byte
	var deadline time.Time
	begun := false // a request has begun, and must be there by deadline
	now := time.Now()
	for {
		mediaType, head, size, plain := parsePlainSend(buf)
		if !plain {
			conn.SetDeadline(time.Time{})
			g.returned.give(&returnedConn{conn.(*net.TCPConn), bytes.NewReader(buf)})
			return
		}
		if size > 0 && len(buf) >= size {
			var status int
			status, text = g.answerSend(text[:0], mediaType, buf[head:size])
			answer = appendAnswer(answer[:0], now, mediaType, status, text)
			if _, err := conn.Write(answer); err != nil {
				conn.Close()
				return
			}
			rest := buf[size:]
			if cap(buf) > sendBufferMax {
				buf = nil
			}
			if cap(text) > sendBufferMax {
				text, answer = nil, nil
			}
			buf = append(buf[:0], rest...)
			begun = false
			continue
		}
		switch {
		case len(buf) > 0 && !begun:
			begun = true
			deadline = now.Add(sendDue)
			conn.SetDeadline(deadline)
		case len(buf) == 0 && deadline.Sub(now) < sendIdle-sendIdleSlack: // not each time, as it costs a timer
			deadline = now.Add(sendIdle)
			conn.SetDeadline(deadline)
		}
		buf = growBuffer(buf, size)
		n, err := conn.Read(buf[len(buf):cap(buf)])
		now = time.Now()
		buf = buf[:len(buf)+n]
		if err != nil {
			conn.Close()
			return
		}
	}
}

// growBuffer returns buf with room for more of a request of size bytes; 0 means not known yet. The room grows with what
// has come: a head that announces megabytes must not be enough to take them.
func growBuffer(buf []byte, size int) []byte {
	if len(buf) < cap(buf) && (size <= cap(buf) || cap(buf) >= sendBufferMax) {
		return buf
	}
	return slices.Grow(buf, min(max(size-len(buf), sendBuffer), sendBufferMax))
}

const plainSend = "POST /internal/send HTTP/1.1\r\n"

// hostBytes are the bytes of a host with a port. harmless are the headers that clients add by themselves, and that mean
// nothing here.
const hostBytes = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-_:[]"

var harmless = []string{"user-agent", "accept-encoding", "accept", "accept-language", "sec-fetch-mode", "traceparent", "tracestate"}

// parsePlainSend looks at the head of a request. size is that of the whole request, or 0 while the head is incomplete.
// plain is false if the request is anything but a POST /internal/send with a Content-Length.
func parsePlainSend(buf []byte) (mediaType string, head, size int, plain bool) {
	if n := min(len(buf), len(plainSend)); string(buf[:n]) != plainSend[:n] {
		return "", 0, 0, false
	}
	head = bytes.Index(buf, []byte("\r\n\r\n"))
	switch {
	case head < 0: // incomplete
		return "", 0, 0, len(buf) <= maxHeader
	case head < len(plainSend): // without headers
		return "", 0, 0, false
	}
	head += len("\r\n\r\n")
	length, hosts := -1, 0
	for rest := buf[len(plainSend) : head-2]; len(rest) > 0; {
		line, after, _ := bytes.Cut(rest, []byte("\r\n"))
		rest = after
		field, value, ok := bytes.Cut(line, []byte(":"))
		value = bytes.Trim(value, " \t")
		if !ok || !isPlain(field) || !isPlain(value) {
			return "", 0, 0, false
		}
		switch name := string(field); {
		case strings.EqualFold(name, "host"):
			hosts++
			ok = len(value) > 0 && len(bytes.Trim(value, hostBytes)) == 0
		case strings.EqualFold(name, "content-length"):
			n, err := strconv.ParseUint(string(value), 10, 31)
			ok = err == nil && length < 0
			length = int(n)
		case strings.EqualFold(name, "content-type"):
			ok = mediaType == ""
			switch string(value) {
			case jsonType:
				mediaType = jsonType
			case ndjson:
				mediaType = ndjson
			default:
				ok = false
			}
		case strings.EqualFold(name, "connection"):
			ok = strings.EqualFold(string(value), "keep-alive")
		default: // others might change what the request means
			ok = slices.ContainsFunc(harmless, func(known string) bool { return strings.EqualFold(name, known) })
		}
		if !ok {
			return "", 0, 0, false
		}
	}
	fits := mediaType == jsonType && length <= maxSend || mediaType == ndjson && length <= maxBatch
	return mediaType, head, head + length, fits && length >= 0 && hosts == 1
}

// isPlain reports whether a part of a header has only visible ASCII and spaces.
func isPlain(part []byte) bool {
	for _, c := range part {
		if c < ' ' || c > '~' {
			return false
		}
	}
	return true
}

// appendAnswer appends a response.
func appendAnswer(b []byte, now time.Time, mediaType string, status int, body []byte) []byte {
	b = append(b, "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(status), 10)
	b = append(b, ' ')
	b = append(b, http.StatusText(status)...)
	b = append(b, "\r\nContent-Type: "...)
	b = append(b, mediaType...)
	b = append(b, "\r\nCache-Control: no-store\r\nDate: "...)
	b = now.UTC().AppendFormat(b, http.TimeFormat)
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

// returnListener is how net/http accepts the connections that sendLoop gives back.
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
