module sidecast

go 1.25
