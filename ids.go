// Names: services, identifiers, tokens and epochs. What they stand for is in connmgr.go and eventlog.go.

package main

import (
	"crypto/rand"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// The services, as identifiers and metrics name them.
const (
	serviceTask    = "task"
	serviceVersion = "version"
	servicePage    = "page"
)

// maxID is the most bytes that an ID may have.
const maxID = 128

// errBadID says that an ID cannot be part of an identifier.
var errBadID = badRequest("bad_id", "id must be 1 to 128 bytes of UTF-8 without colon and control characters")

// checkID returns errBadID unless a browser's ID can be part of an identifier "service:id".
func checkID(id string) error {
	bad := func(r rune) bool { return r == ':' || unicode.IsControl(r) }
	if id == "" || len(id) > maxID || !utf8.ValidString(id) || strings.ContainsFunc(id, bad) {
		return errBadID
	}
	return nil
}

// serviceOf returns the service of an identifier "service:id".
func serviceOf(identifier string) string {
	service, _, _ := strings.Cut(identifier, ":")
	return service
}

// newEpoch returns 8 random characters (40 bits) that tell a log, or a run of a gateway, from all others.
func newEpoch() string { return strings.ToLower(rand.Text()[:8]) }

// newToken returns a random UUID, version 4 (RFC 9562 section 5.4).
func newToken() string {
	var b [16]byte
	rand.Read(b[:])
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// mask shortens a token for logs: enough to tell streams apart, too little to send to one.
func mask(token string) string { return token[:min(len(token), 8)] }
