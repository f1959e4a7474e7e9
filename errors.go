// Errors that a client may see.

package main

import "net/http"

// apiError is an error that a client may see.
type apiError struct {
	status     int
	Text       string `json:"error"`            // fixed
	Code       string `json:"code,omitempty"`   // from the closed set in openapi.yaml; the gateway's own errors have none
	TaskStatus string `json:"status,omitempty"` // that of the task, with a 409

	// Of a body with a report on each line: which line is bad, and how many reports were taken before a shutdown.
	Line    int  `json:"line,omitempty"`
	Reports *int `json:"reports,omitempty"`
}

func (e *apiError) Error() string { return e.Text }

func newError(status int, code, text string) *apiError {
	return &apiError{status: status, Text: text, Code: code}
}

func badRequest(code, text string) *apiError { return newError(http.StatusBadRequest, code, text) }
